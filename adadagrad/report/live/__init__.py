"""The live view: one local page that shows a run, or several, while they are written."""
