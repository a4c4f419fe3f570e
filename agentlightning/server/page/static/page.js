// Show times in the reader's own zone, and in UTC on hover, where the page without scripts has UTC alone.
const digits = (number, length = 2) => String(number).padStart(length, "0");

function localTime(at, ...parts) {
  const day = [digits(at.getFullYear(), 4), digits(at.getMonth() + 1), digits(at.getDate())].join("-");
  // Without a line break between them.
  return `${day}\u00a0${[at.getHours(), at.getMinutes(), ...parts].map((each) => digits(each)).join(":")}`;
}

function showLocalTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    time.title = time.textContent;
    time.textContent = localTime(at, at.getSeconds());
  }
  // In a chart, to the minute.
  for (const text of root.querySelectorAll("[data-at]")) text.textContent = localTime(new Date(text.dataset.at));
}

showLocalTimes(document);
document.addEventListener("htmx:before:swap", (event) => {
  // Before htmx compares the new page with the old one, so that times that stay the same are left alone.
  for (const task of event.detail.tasks) showLocalTimes(task.fragment);
});
// On a page that was opened as http://agl:KEY@HOST/, addresses would have the key in them, which fetch and the history
// refuse. The browser has kept the key: open the page again without it in the address.
if (new URL(document.baseURI).username || new URL(document.baseURI).password) {
  const address = new URL(location.href);
  address.username = address.password = "";
  location.replace(address);
}

// Report that the store does not answer: the page then shows what it last knew.
const trouble = document.getElementById("trouble");
for (const name of ["htmx:error", "htmx:response:error"]) {
  document.addEventListener(name, () => {
    trouble.textContent ||= `The store does not answer. This page shows its state at ${new Date().toLocaleTimeString()}`;
  });
}
document.addEventListener("htmx:after:swap", (event) => {
  // Errors end here as well, with nothing swapped in.
  if (event.detail.ctx.response?.status < 400) trouble.textContent = "";
});
