"use strict";
// Puts what the server sends into its place, as long as somebody looks. Without it, a page stays as it was loaded.
(() => {
  const main = document.querySelector("main[data-live]");
  if (!main || !window.EventSource) return;

  const FOCUSABLE = "a,button,input,[tabindex]";
  const SPEAK_EVERY_MS = 30000;
  const FIRST_PAUSE_MS = 1000, MOST_PAUSE_MS = 10000;
  let source = null, again = 0, pause = FIRST_PAUSE_MS, spoken = 0;

  function put(parts) {
    for (const [id, html] of Object.entries(parts)) {
      const place = document.getElementById(id);
      if (!place) continue;
      const focused = place.contains(document.activeElement) ? [...place.querySelectorAll(FOCUSABLE)].indexOf(document.activeElement) : -1;
      const template = document.createElement("template");
      template.innerHTML = html;
      place.replaceChildren(template.content);
      if (focused >= 0) place.querySelectorAll(FOCUSABLE)[focused]?.focus({ preventScroll: true });
    }
  }

  // For those who listen to the page: now and then, not twice a second.
  function speak() {
    const said = document.querySelector("[data-spoken]"), place = document.getElementById("spoken");
    if (!said || !place || Date.now() - spoken < SPEAK_EVERY_MS) return;
    spoken = Date.now();
    place.textContent = said.dataset.spoken;
  }

  function open() {
    clearTimeout(again);
    if (source || document.hidden) return;
    source = new EventSource(main.dataset.live);
    source.addEventListener("version", (event) => {
      pause = FIRST_PAUSE_MS;
      document.body.removeAttribute("data-lost");
      if (event.data !== document.documentElement.dataset.version) location.reload(); // the server has other files now
    });
    source.addEventListener("parts", (event) => {
      const parts = JSON.parse(event.data);
      // A page that could not be made is made once the server has what it needs.
      if ("waiting" in main.dataset) { if (Object.keys(parts).length > 2) location.reload(); return; }
      put(parts);
      speak();
    });
    source.onerror = () => {
      document.body.setAttribute("data-lost", "");
      close();
      again = setTimeout(open, pause * (0.5 + Math.random() / 2));
      pause = Math.min(pause * 2, MOST_PAUSE_MS);
    };
  }

  function close() {
    source?.close();
    source = null;
  }

  // Nobody looks: nothing is sent. Whoever comes back gets everything anew.
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
})();
