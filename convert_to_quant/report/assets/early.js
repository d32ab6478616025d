// Before the first paint, so that a dark page does not flash white. The hash decides, or else the system.
document.documentElement.dataset.theme =
  (/[#&]theme=(light|dark)\b/.exec(location.hash) || [])[1] ||
  (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
