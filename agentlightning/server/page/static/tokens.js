// Select a token by click or keys, and describe it below its text; the address names the selection in the answer.
const place = new Map(); // Each token's position in its text.

function tokensOf(text) {
  const found = [...text.getElementsByClassName("t")];
  if (!place.has(found[0])) found.forEach((token, index) => place.set(token, index));
  return found;
}

const logprobOf = (token) => {
  const text = token.dataset.t.split(" ")[1];
  return text === undefined ? null : text === "-inf" ? -Infinity : Number(text);
};

const percent = (logprob) => `${(100 * Math.exp(logprob === "-inf" ? -Infinity : Number(logprob))).toPrecision(3)} %`;

// One token at a time: of the prompt or of the answer.
function chooseNone() {
  document.querySelector(".tokens .chosen")?.classList.remove("chosen");
  for (const description of document.getElementsByClassName("description")) description.textContent = "";
  for (const details of document.getElementsByClassName("details")) details.hidden = true;
}

function choose(text, token) {
  chooseNone();
  token.classList.add("chosen");
  const [id, logprob] = token.dataset.t.split(" ");
  const chance = logprob === undefined ? "" : `, logprob ${logprob} (${percent(logprob)})`;
  document.getElementById(`${text.id}-description`).textContent =
    `Token ${place.get(token)}: ${JSON.stringify(token.textContent)}, id ${id}${chance}`;
  show(token);
  loadDetails(text, token);
  if (text.id === "answer") {
    history.replaceState(null, "", `#t${place.get(token)}`);
    document.getElementById("share").hash = `t${place.get(token)}`;
  }
}

// What else could have been there comes once the choice has stayed for a moment: somebody may hold a key down.
const PAUSE = 150;
let waiting;

function loadDetails(text, token) {
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    const answer = await fetch(`${text.dataset.details}&at=${place.get(token)}`).catch(() => null);
    const found = answer?.ok ? await answer.text() : "";
    if (!found || !token.classList.contains("chosen")) return;
    const details = document.getElementById(`${text.id}-details`);
    details.innerHTML = found;
    details.hidden = false;
    const inspector = details.parentElement;
    document.documentElement.style.setProperty("--inspected", `${inspector.offsetHeight + 16}px`);
    show(token);
  }, PAUSE);
}

document.addEventListener("click", (event) => {
  const token = event.target.closest(".tokens .t");
  if (!token) return;
  const text = token.closest(".tokens");
  tokensOf(text);
  // Once more: its description goes, which lies over the text below on a small screen.
  if (token.classList.contains("chosen")) chooseNone();
  else choose(text, token);
});

// A block that comes into view may turn out larger than estimated, and push the token out of view again.
function show(token, frames = 10) {
  token.scrollIntoView({ block: "nearest" });
  if (frames) requestAnimationFrame(() => show(token, frames - 1));
}

const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20, Home: -Infinity, End: Infinity };

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") chooseNone();
  const text = event.target.closest?.(".tokens");
  if (!text || !(event.key in STEPS) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const tokens = tokensOf(text);
  const chosen = text.querySelector(".chosen");
  const next = (chosen ? place.get(chosen) : -1) + STEPS[event.key];
  if (tokens.length) choose(text, tokens[Math.min(Math.max(next, 0), tokens.length - 1)]);
});

function chooseByAddress() {
  const text = document.getElementById("answer");
  const named = /^#t(\d+)$/.exec(location.hash);
  const token = text && named && tokensOf(text)[Number(named[1])];
  if (token) choose(text, token);
}

function plot() {
  const box = document.getElementById("plot");
  if (!box) return;
  const text = document.getElementById("answer");
  const tokens = tokensOf(text);
  // A logprob of minus infinity cannot be plotted.
  const logprobs = tokens.map(logprobOf).map((each) => (Number.isFinite(each) ? each : null));
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
  const probe = document.createElement("span");
  document.body.append(probe);
  const resolved = (name) => ((probe.style.color = colour(name)), getComputedStyle(probe).color);
  const [line, faint, link] = ["--line", "--faint", "--accent"].map(resolved);
  probe.remove();
  const axis = { stroke: faint, grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
  box.replaceChildren();
  const chart = new uPlot(
    {
      width: box.clientWidth,
      height: 190,
      legend: { show: false },
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 30 }, { ...axis, size: 55 }],
      series: [{}, { stroke: link, width: 1, points: { show: tokens.length < 200, size: 4 } }],
      cursor: { drag: { x: true, y: false } },
    },
    [tokens.map((_, index) => index), logprobs],
    box,
  );
  chart.over.addEventListener("click", () => {
    if (chart.cursor.idx != null) choose(text, tokens[chart.cursor.idx]);
  });
  return chart;
}

let chart = plot();
addEventListener("resize", () => chart?.setSize({ width: document.getElementById("plot").clientWidth, height: 190 }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  chart?.destroy();
  chart = plot();
});
addEventListener("hashchange", chooseByAddress);
chooseByAddress();
