// Says so where the store does not answer: what is shown then is what it was.
const trouble = document.getElementById("trouble");
for (const name of ["htmx:error", "htmx:response:error"]) {
  document.addEventListener(name, () => {
    trouble.textContent ||= `The store does not answer: this is how it was at ${new Date().toLocaleTimeString()}`;
  });
}
document.addEventListener("htmx:after:swap", (event) => {
  // Also where nothing was put in, since the store has answered that it cannot.
  if (event.detail.ctx.response?.status < 400) trouble.textContent = "";
});
