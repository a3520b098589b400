"""Pages from templates: one file each, pictures inside, light and dark, no scripts."""

import base64
import functools
import io
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clvr_jax import __version__
from clvr_jax.statistics import Rate


def page(template: str, **values: Any) -> str:
    """Return the HTML of a template of `templates/`; all of them extend `base.html.jinja`.

    Args:
      template: name of the file.
      values: what it shows; text is escaped. `base` wants `title`, and shows `facts`, pairs of
        name and value, at the end.

    Raises:
      jinja2.UndefinedError: a value that the template needs is not given.
    """
    return _environment().get_template(template).render(version=__version__, **values)


def png_uri(picture: UInt8[np.ndarray, "y x 3"] | Image.Image, most: int | None = None) -> str:
    """Return a picture as a data URI, shrunk where a side has more than `most` pixels."""
    file = io.BytesIO()
    shown = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if most is not None and max(shown.size) > most:
        shown = shown.convert("RGB")
        shown.thumbnail((most, most))
    shown.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def percent(share: float) -> str:
    """Return a share in words of percent, "12.3 %"."""
    return f"{100 * share:.1f} %"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clvr_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["rate"] = lambda value: isinstance(value, Rate)
    environment.filters["percent"] = percent
    return environment
