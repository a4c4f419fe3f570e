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
