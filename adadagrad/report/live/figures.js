// What the charts show: for each run the layers of each chart, and the values to read out above it.

const color = place => `var(--run-${place % 6})`;
const dashOf = place => [undefined, "7 4", "9 3 2 3", "2 4"][Math.floor(place / 6) % 4];
const column = (run, name) => finite(run.rows.map(row => [row[0], row[columns[name]]]));
const last = points => points.length ? points[points.length - 1] : null;

// Stairs: the size of a row holds from the row before up to it.
const sizes = run => run.rows.length ? [[Math.max(0, run.rows[0][0] - run.rows[0][2]), run.rows[0][2]], ...run.rows.map(row => [row[0], row[2]])] : [];

// Samples in a second, over a window of about a fortieth of the run.
function speeds(run) {
  const rows = run.rows, width = Math.max(1, Math.round(rows.length / 40)), found = [];
  let origin = rows.length ? [rows[0][0] - rows[0][2], 0] : null;
  for (let index = 0; index < rows.length; index++) {
    const from = index >= width ? rows[index - width] : origin;
    const seconds = rows[index][1] - from[1];
    if (seconds > 0) found.push([rows[index][0], Number(((rows[index][0] - from[0]) / seconds).toPrecision(3))]);
  }
  return found;
}

function accuracyNames() {
  const names = [...new Set(runs.flatMap(run => Object.keys(run.metrics)))];
  const rank = name => name === "val/accuracy" ? 0 : name === "test/accuracy" ? 1 : /(^|\/)accuracy$/.test(name) ? 2 : 3;
  return names.sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1)).slice(0, 8);
}

const words = {val: "validation", train: "training"};
const titled = name => { const said = name.split("/").map(part => words[part] ?? part).join(" "); return said[0].toUpperCase() + said.slice(1); };

// Every chart: a title, how to read it, and for each run the layers and the values to read out.
function charts() {
  const tests = runs.some(run => column(run, "right").length);
  const one = runs.length === 1;
  const asked = !tests && runs.some(run => column(run, "requested").length);
  const list = [{
    name: "batch", title: asked ? "Batch size asked for and used" : "Batch size", options: {log: true, base: 2},
    reading: asked ? "The line is what the steps had; dots are what the policy asked for at each measured step, before its bounds." : "Examples in one optimizer step.",
    layers: run => [
      {kind: "step", points: sizes(run)},
      {kind: "dots", points: asked ? column(run, "requested") : [], opacity: .65, width: 4.5, color: one ? "var(--run-1)" : undefined},
    ],
    read: layers => asked ? [["used", layers[0].points], ["asked for", layers[1].points]] : [["", layers[0].points]]}];
  if (tests) list.push({
    name: "test", title: "The two sides of the test", options: {log: true, logFrom: 1.5},
    reading: "Dots: relative variance of the gradient, V/(b·s) for the norm test; the line runs through their middle. Above the dashed threshold the batch grows.",
    layers: run => {
      const right = column(run, "right"), left = right.length ? column(run, "left") : [];
      return [
        {kind: "line", points: smooth(left)},
        {kind: "dots", points: left, opacity: .3, width: 3.5, quiet: left.length > 80, extent: middle(left)},
        {kind: "step", points: right, dash: "5 4", width: 1.6, tip: false, color: one ? "var(--run-1)" : undefined},
      ];
    },
    read: layers => [["measured", layers[0].points], ["threshold", layers[2].points]]});
  list.push({
    name: "loss", title: "Training loss", reading: one ? "Mean loss of the steps, smoothed; the steps themselves are pale." : "Mean loss of the steps, smoothed.", options: {log: true, logFrom: 30},
    layers: run => {
      const points = column(run, "loss");
      const band = run.rows.filter(row => row[columns.loss_low] !== null).map(row => [row[0], row[columns.loss_low], row[columns.loss_high]]);
      const merged = band.some(point => point[1] !== point[2]);
      if (!one) return [{kind: "line", points: smooth(points)}];
      return [{kind: "line", points: smooth(points)},
              merged ? {kind: "band", points: band, quiet: true} : {kind: "line", points: points.length < 40 ? [] : points, width: 1, opacity: .3, quiet: true, tip: false}];
    }});
  for (const name of accuracyNames()) {
    const accuracy = /(^|\/)accuracy$/.test(name);
    list.push({
      name: "metric " + name, title: titled(name), reading: accuracy ? "Share of examples that are classified correctly; the axis does not begin at 0." : "As the training script logs it.",
      options: accuracy ? {ceiling: 1} : {log: true, logFrom: 30},
      late: accuracy,
      layers: run => {
        const points = finite(run.metrics[name] ?? []);
        return [{kind: "line", points}, {kind: "dots", points: points.length <= 60 ? points : [], width: 4.5}];
      }});
  }
  list.push(
    {name: "lr", title: "Learning rate", reading: "Of the first parameter group, as the step used it.", options: {log: true, logFrom: 30, zero: true},
     layers: run => [{kind: "line", points: column(run, "lr")}]},
    {name: "speed", title: "Throughput", reading: "Samples in a second of training, measuring included and evaluation left out.", options: {zero: true, unit: " /s"},
     layers: run => [{kind: "line", points: speeds(run)}]});
  return list;
}

function showCharts() {
  const wanted = charts(), holder = find("figures");
  const end = Math.max(1, ...runs.map(run => last(run.rows)?.[0] ?? 0));
  for (const figure of [...holder.children])
    if (!wanted.some(chart => chart.name === figure.dataset.name)) figure.remove();
  const placed = wanted.map((chart, index) => {
    let figure = [...holder.children].find(one => one.dataset.name === chart.name);
    if (!figure) {
      figure = html("figure", {}, html("div", {className: "top"}, html("h2", {}), html("output", {})), html("div", {className: "plot"}), html("figcaption", {}));
      figure.dataset.name = chart.name;
      figure.setAttribute("role", "group");
      hover(figure.querySelector(".plot"));
    }
    if (holder.children[index] !== figure) holder.insertBefore(figure, holder.children[index] ?? null);
    const byRun = runs.map((run, place) => chart.layers(run, place).map(layer =>
      ({...layer, color: layer.color ?? color(place), dash: layer.dash ?? (layer.kind === "dots" ? undefined : dashOf(place))})));
    const layers = byRun.flat().filter(layer => layer.points.length);
    figure.hidden = !layers.length;
    return [chart, figure, byRun, layers];
  }).filter(([, figure]) => !figure.hidden);
  holder.classList.toggle("odd", placed.length % 2 === 1);
  for (const [chart, figure, byRun, layers] of placed) {
    figure.querySelector("h2").textContent = chart.title;
    figure.querySelector("figcaption").textContent = chart.reading;
    figure.setAttribute("aria-label", chart.title);
    const options = {...chart.options, end, title: chart.title};
    if (chart.late) options.floor = lateFloor(byRun);
    draw(figure.querySelector(".plot"), layers, options);
    figure.read = seen => readOut(figure, chart, byRun, seen);
    figure.read(hovered);
  }
  cross();
}

// Below what the first tenth of the evaluations had there is little to see.
function lateFloor(byRun) {
  const late = byRun.flatMap(layers => layers[0].points.slice(Math.floor(layers[0].points.length / 10)).map(point => point[1]));
  return late.length ? Math.max(0, Math.min(...late) - Math.max(0.01, 0.06 * (Math.max(...late) - Math.min(...late)))) : undefined;
}

function readOut(figure, chart, byRun, seen) {
  const output = figure.querySelector("output");
  const one = byRun.length === 1;
  const shown = byRun.flatMap((layers, place) => {
    const named = chart.read ? chart.read(layers) : [["", layers[0].points]];
    if (!layers[0].points.length) return [];
    return (one ? named : named.slice(0, 1)).map(([said, points]) => {
      const point = seen === null ? last(points) : at(points, seen);
      const value = html("b", {}, compact(point?.[1]) + (chart.options.unit ?? ""));
      if (one) return html("span", {}, said ? said + " " : "", value);
      const key = html("span", {className: "icon-key"});
      key.style.background = color(place);
      return html("span", {}, key, value);
    });
  });
  output.replaceChildren(...(byRun.length > 6 ? [] : shown));
}

function hover(plot) {
  plot.addEventListener("pointermove", event => {
    if (!plot.scale) return;
    const {box, end, width} = plot.scale, area = plot.getBoundingClientRect();
    const inside = (event.clientX - area.left) * width / area.width;
    hovered = Math.min(end, Math.max(0, (inside - box.left) / (box.right - box.left) * end));
    cross();
  });
  plot.addEventListener("pointerleave", () => { hovered = null; cross(); });
}

function cross() {
  for (const figure of find("figures").children) {
    const scale = figure.querySelector(".plot").scale;
    if (!scale || figure.hidden) continue;
    scale.cross.setAttribute("visibility", hovered === null ? "hidden" : "visible");
    if (hovered !== null) for (const end of ["x1", "x2"]) scale.cross.setAttribute(end, scale.x(hovered));
    figure.read?.(hovered);
  }
}
