// Before anything is painted, so that a dark page never flashes white: the hash decides, or else the system.
document.documentElement.dataset.theme =
  (/[#&]theme=(light|dark)\b/.exec(location.hash) || [])[1] ||
  (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
