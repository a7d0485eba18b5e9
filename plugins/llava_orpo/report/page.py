"""The report's page: fills the template, embeds images as thumbnails, formats numbers."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

import jinja2
from bokeh.resources import Resources
from PIL import Image

from .examples import Example

TEMPLATES = Path(__file__).parent / "templates"


def thumbnails(examples: list[Example], side: int) -> dict[Path, dict]:
    """The examples' images as data URIs, at most `side` pixels long, JPEG or PNG, whichever is smaller.

    By path: {"source", "width", "height"} or, for an image that cannot be read, {"source": "", "problem"}.
    """
    images = {}
    for path in {example.texts.image for example in examples if example.texts.image}:
        if not path.exists():
            images[path] = {"source": "", "problem": f"{path.name} is missing"}
            continue
        try:
            with Image.open(path) as image:
                image.thumbnail((side, side), Image.Resampling.LANCZOS)
                small = Image.new("RGB", image.size, "white")
                small.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A"))
        except (OSError, Image.DecompressionBombError) as error:
            images[path] = {"source": "", "problem": f"{path.name} cannot be read: {error}"}
            continue
        encoded = [("jpeg", _encode(small, "jpeg", quality=80))]
        if small.getcolors(4096):  # drawn rather than photographed: PNG may be smaller, and is exact
            encoded.append(("png", _encode(small, "png", optimize=True)))
        kind, content = min(encoded, key=lambda one: len(one[1]))
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        images[path] = {"source": source, "width": small.width, "height": small.height}
    return images


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def render(context: dict, images: dict[Path, dict]) -> str:
    """Fills the template: every value is escaped, and only the page's own scripts may run (CSP by hash)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Bokeh's JSON defines a model where it is first mentioned: sorted keys (Jinja's default) would break it.
    environment.policies["json.dumps_kwargs"] = {}
    environment.filters |= {"percent": percent, "points": points, "number": number, "p_value": p_value}
    # BokehJS without its widgets, tables, WebGL and MathJax, which would add 4 MB.
    library = "\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)
    scripts = [library, (TEMPLATES / "report.js").read_text(encoding="utf-8")]
    for script in scripts:
        if "</script" in script.lower() or "\r" in script:
            raise ValueError("A script cannot be inlined as it is: it holds </script or a carriage return.")
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    return environment.get_template("report.html.j2").render(
        **context,
        images=images,
        scripts=scripts,
        script_hashes=hashes,
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def percent(value: float) -> str:
    """0.1234 as "12.3%"."""
    return f"{100 * value:.1f}%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points: -0.1234 as "−12.3"."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def number(value: float, signed: bool = False) -> str:
    """The value with three decimals and a real minus sign."""
    return (f"{value:+.3f}" if signed else f"{value:.3f}").replace("-", "−")


def p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
