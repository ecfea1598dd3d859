// Loaded before the first paint, so that a remembered scheme never flashes the other one.
try {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
} catch {
  // Storage may be forbidden; the system's scheme is used then.
}
