"""The picture as a page of its own, which tells under the pointer what lies where."""

from __future__ import annotations

import base64
import hashlib
from xml.sax.saxutils import escape

from underlay.jobs.picture.model import Picture
from underlay.jobs.picture.svg import element
from underlay.jobs.picture.words import short_name

__all__ = ["page"]

_STYLE = """
body{margin:0;background:#eef0f2;color-scheme:light dark}
svg{display:block;width:100%;min-width:760px;max-width:1400px;height:auto;margin:24px auto}
#told{position:fixed;left:0;top:0;padding:6px 10px;border-radius:6px;background:#1b2027;
color:#f4f6f8;font:13px/1.4 system-ui,sans-serif;font-variant-numeric:tabular-nums;
white-space:nowrap;pointer-events:none;visibility:hidden;box-shadow:0 2px 8px #0004}
.here{stroke:#d0342c;stroke-width:1;pointer-events:none;visibility:hidden}
.there{stroke:#d0342c;stroke-width:1.5;fill:none;pointer-events:none;visibility:hidden}
.host{cursor:crosshair}
@media(prefers-color-scheme:dark){body{background:#0b0d10}
#told{background:#eceff3;color:#1b2027}.here,.there{stroke:#ff7b72}}
"""

#: Native tooltips come late: the titles are told at once instead. What is pointed at in one half
#: of the picture is marked in the other.
_SCRIPT = """
const svg = document.querySelector("svg"), told = document.getElementById("told");
const map = svg.querySelector(".guests"), plots = svg.querySelector(".plots");
const number = (node, name) => Number(node.dataset[name]);
const start = number(plots, "start"), length = number(plots, "length");
const cell = number(map, "cell"), pitch = number(map, "pitch"), high = number(map, "high");
const columns = number(map, "columns"), width = number(plots, "width");
const add = (parent, name, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return parent.appendChild(made);
};
const line = add(plots, "line", {class: "here", y1: 0, y2: number(plots, "height")});
const frame = add(map, "rect", {class: "there", width: pitch, height: high});
const words = new Map();
for (const title of svg.querySelectorAll(".tip title, .host title")) {
  words.set(title.parentNode, title.textContent);
  title.remove();
}
const size = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < 6) { bytes /= 1024; unit += 1; }
  return `${Number(bytes.toPrecision(4))} ${units[unit]}`;
};
const show = (node, on) => { node.style.visibility = on ? "visible" : "hidden"; };
const mark = (share) => {
  line.setAttribute("x1", share * width);
  line.setAttribute("x2", share * width);
  const index = Math.min(Math.floor(share * length / cell), Math.ceil(length / cell) - 1);
  frame.setAttribute("x", index % columns * pitch - 0.5);
  frame.setAttribute("y", Math.floor(index / columns) * high - 0.5);
};
svg.addEventListener("pointermove", (event) => {
  const target = event.target, host = target.closest(".host");
  const known = words.has(target);
  show(told, known);
  show(line, known);
  show(frame, known);
  if (!known) return;
  let text = words.get(target);
  const box = target.getBoundingClientRect();
  const across = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
  if (host) {
    const up = Math.min(Math.max(1 - (event.clientY - box.top) / box.height, 0), 1);
    mark(across);
    text = `disk ${size(start + across * length)} · file ${size(up * number(host, "size"))}`;
  } else {
    const area = target.getBBox();
    const index = Math.round(area.y / high) * columns + (area.x + across * area.width) / pitch;
    mark(Math.min(index * cell / length, 1));
  }
  told.textContent = text;
  const left = Math.min(event.clientX + 14, innerWidth - told.offsetWidth - 8);
  const below = event.clientY + 18;
  const top = below + told.offsetHeight < innerHeight ? below : event.clientY - 40;
  told.style.transform = `translate(${Math.max(left, 4)}px, ${top}px)`;
});
svg.addEventListener("pointerleave", () => { [told, line, frame].forEach((n) => show(n, false)); });
"""


def page(picture: Picture) -> str:
    """An HTML document; its policy lets nothing be loaded, and no script run but its own."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(short_name(picture.name))}</title>\n<style>{_STYLE}</style>\n"
        "</head>\n<body>\n"
        + "\n".join(element(picture))
        + '\n<div id="told" role="status"></div>\n'
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )
