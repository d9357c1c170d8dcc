// The page: asks for what is new, keeps it, and shows it.

const find = id => document.getElementById(id);
let token = "", runs = [], columns = {}, hovered = null, lost = 0;
const ASK = 1000, ASK_FINISHED = 5000, ASK_HIDDEN = 10000;

function html(name, options, ...children) {
  const made = document.createElement(name);
  Object.assign(made, options);
  made.append(...children);
  return made;
}

function take(answer) {
  answer.columns.forEach((name, place) => { columns[name] = place; });
  runs = answer.runs.map((news, place) => {
    const before = runs[place];
    const rows = news.from && before ? before.rows.slice(0, news.from).concat(news.rows) : news.rows;
    return {...news, rows, metrics: news.metrics ?? before?.metrics ?? {}};
  });
  token = answer.next;
}

function clock(seconds) {
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

const counts = run => String(run.start.rate ?? "").includes("progress_in='scale_invariant'");
const done = run => counts(run) ? Number(run.last.progress ?? 0) : run.last.samples_seen ?? 0;
const share = run => run.state === "finished" ? 1 : run.start.total_samples ? Math.min(1, done(run) / run.start.total_samples) : null;

function left(run) {
  const total = run.start.total_samples, speed = last(speeds(run))?.[1];
  return total && speed && run.state === "running" ? (total - done(run)) / speed : NaN;
}

function said(run) {
  const ago = clock(left(run));
  return {waiting: "waiting for the first step", running: "running" + (ago ? `, about ${ago} left` : ""), finished: "finished",
          stalled: "stalled: no new line for a while"}[run.state];
}

function accuracyOf(run) {
  const name = accuracyNames()[0], points = finite(run.metrics[name] ?? []);
  return name && points.length ? {name: titled(name), value: last(points)[1], best: points.reduce((a, b) => Math.max(a, b[1]), -Infinity), accuracy: /accuracy$/.test(name)} : null;
}

function showTiles(run) {
  const numbers = run.last, metric = accuracyOf(run), speed = last(speeds(run))?.[1];
  const next = numbers.requested;
  const tiles = [
    ["batch size", compact(last(sizes(run))?.[1]), next === undefined ? "" : `asked for ${compact(Number(next))}`],
    ["training loss", compact(numbers.loss === undefined || numbers.loss === null ? null : Number(numbers.loss)), run.skipped ? `${run.skipped} skipped, not finite` : ""],
    ...(metric ? [[metric.name.toLowerCase(), metric.accuracy ? metric.value.toFixed(4) : compact(metric.value), metric.accuracy ? `best ${metric.best.toFixed(4)}` : ""]] : []),
    ["learning rate", compact(last(column(run, "lr"))?.[1]), numbers.rate_factor && numbers.reason !== "short batch" ? `× ${compact(numbers.rate_factor)} for the batch` : ""],
    ["samples per second", compact(speed), ""],
    ["samples seen", whole(numbers.samples_seen), `${whole(numbers.step)} steps`],
  ];
  find("tiles").replaceChildren(...tiles.map(([name, value, note]) => html("div", {}, html("dt", {}, name), html("dd", {}, value, html("small", {}, note)))));
}

function showTable() {
  const metric = accuracyNames()[0];
  const headings = ["run", "state", "batch size", "loss", ...(metric ? [titled(metric).toLowerCase()] : []), "learning rate", "samples/s", "samples", "steps", "done"];
  const table = find("table").firstElementChild;
  table.tHead.replaceChildren(html("tr", {}, ...headings.map(name => { const cell = html("th", {}, name); cell.scope = "col"; return cell; })));
  table.tBodies[0].replaceChildren(...runs.map((run, place) => {
    const key = html("span", {className: "icon-key"}), own = accuracyOf(run), part = share(run);
    key.style.background = color(place);
    const cells = [run.state, compact(last(sizes(run))?.[1]), compact(last(column(run, "loss"))?.[1]), ...(metric ? [own ? own.value.toFixed(4) : "–"] : []),
                   compact(last(column(run, "lr"))?.[1]), compact(last(speeds(run))?.[1]), whole(run.last.samples_seen ?? 0), whole(run.last.step ?? 0), part === null ? "–" : `${Math.floor(100 * part)}%`];
    return html("tr", {}, html("td", {}, key, run.name), ...cells.map(text => html("td", {}, text)));
  }));
}

function showFacts() {
  const one = runs[0]?.start ?? {};
  const same = key => runs.every(run => run.start[key] === one[key]) && one[key] !== undefined && one[key] !== null;
  const facts = [
    runs.length === 1 && same("policy") ? String(one.policy) : null,
    same("optimizer") ? String(one.optimizer) : null,
    same("parameters") ? `${whole(one.parameters)} parameters` : null,
    same("dataset_size") ? `${whole(one.dataset_size)} training examples` : null,
    same("total_samples") ? `budget ${whole(one.total_samples)} samples` : null,
    same("ranks") && one.ranks > 1 ? `${one.ranks} ranks` : null,
    runs.some(run => run.broken) ? `${runs.reduce((sum, run) => sum + run.broken, 0)} lines that cannot be read are left out` : null,
  ];
  find("facts").textContent = facts.filter(Boolean).join(" · ");
}

function showState() {
  const begun = runs.filter(run => run.rows.length), running = runs.filter(run => run.state === "running");
  const state = lost ? "lost" : !runs.length ? "waiting" : running.length ? "running" : runs.some(run => run.state === "stalled") ? "stalled" : runs.every(run => run.state === "finished") ? "finished" : "waiting";
  const text = lost ? "the server does not answer" : !runs.length ? "waiting for a run" : runs.length === 1 ? said(runs[0]) : state === "running" ? `${running.length} of ${runs.length} running` : state;
  const shown = find("state");
  if (shown.textContent !== text) shown.textContent = text;
  shown.dataset.state = state;
  find("empty").hidden = begun.length > 0;
  find("wish").textContent = runs.length ? "The run has begun, and its first step is not done yet." : "No run here yet.";
  const shares = runs.map(share).filter(part => part !== null), part = shares.length ? shares.reduce((a, b) => a + b, 0) / shares.length : null;
  find("bar").hidden = part === null || !begun.length;
  find("fill").style.width = `${(100 * (part ?? 0)).toFixed(2)}%`;
  find("bar").setAttribute("aria-valuenow", Math.round(100 * (part ?? 0)));
  const mark = {running: "● ", finished: "✓ ", stalled: "! "}[state] ?? "";
  document.title = `${mark}${part !== null && state === "running" ? Math.floor(100 * part) + "% " : ""}${document.querySelector("h1").textContent}`;
}

function showSettings() {
  const holder = find("settings");
  runs.forEach((run, place) => {
    let details = holder.children[place];
    if (!details) {
      details = html("details", {}, html("summary", {}), html("dl", {}));
      holder.append(details);
    }
    const text = JSON.stringify([run.name, run.start]);
    if (details.text === text) return;
    details.text = text;
    details.firstElementChild.textContent = runs.length === 1 ? "Settings" : `Settings of ${run.name}`;
    details.lastElementChild.replaceChildren(...Object.entries(run.start).filter(([key]) => !["kind", "version", "time", "samples_seen"].includes(key))
      .flatMap(([key, value]) => [html("dt", {}, key.replaceAll("_", " ")), html("dd", {}, value === null ? "none" : String(value))]));
  });
  while (holder.children.length > runs.length) holder.lastElementChild.remove();
  holder.hidden = !runs.some(run => run.start.kind);
}

function show() {
  showState();
  showFacts();
  find("tiles").hidden = runs.length !== 1 || !runs[0].rows.length;
  find("table").hidden = runs.length < 2;
  if (!find("tiles").hidden) showTiles(runs[0]);
  if (!find("table").hidden) showTable();
  showCharts();
  showSettings();
}

async function ask() {
  let wait = ASK;
  try {
    const response = await fetch("data?since=" + token, {cache: "no-store"});
    if (!response.ok) throw new Error(response.statusText);
    const answer = await response.json();
    lost = 0;
    take(answer);
    show();
    if (answer.more) wait = 0;
    else if (runs.length && runs.every(run => run.state === "finished")) wait = ASK_FINISHED;
  } catch (error) {
    lost++;
    showState();
    wait = Math.min(10000, 1000 * lost);
  }
  setTimeout(ask, document.hidden ? Math.max(wait, ASK_HIDDEN) : wait);
}

let drawn = 0;
new ResizeObserver(() => requestAnimationFrame(() => {
  const width = find("figures").clientWidth;
  if (width === drawn) return;
  drawn = width;
  showCharts();
})).observe(find("figures"));
document.addEventListener("visibilitychange", () => { if (!document.hidden) show(); });
ask();
