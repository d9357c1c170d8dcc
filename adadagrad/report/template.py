"""Pages from the templates that lie beside this file."""

from __future__ import annotations

from importlib import resources

from adadagrad.core.errors import MissingExtra


def render(name: str, **values: object) -> str:
    """Fill a template.

    Args:
        name: Of its file.
        **values: What it speaks of; a name that is missing is an error, and text is escaped.

    Returns:
        The page.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "report") from error
    folder = resources.files("adadagrad.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: folder.joinpath(file).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name).render(**values)
