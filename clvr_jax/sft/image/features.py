"""Text features and latents on disk, so that training needs neither text encoder nor VAE.

One safetensors file for each text and picture, named by its content and by the weights that made
it: what several samples share is stored once, and features of other weights, types or sizes are
never taken for these. `precompute.py` makes them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax.data.images import read_bytes
from clvr_jax.generate.image import Networks
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.sft.image.pictures import Picture
from clvr_jax.weights import SafetensorsReader, write_safetensors
from clvr_jax.weights.header import make_header

Spec = tuple[tuple[int, ...], Any]  # shape and type

_TENSOR = "features"


class Features:
    """A folder of features.

    Args:
      folder: where they lie; made when the first are written.
      networks: that make them.
      text_encoder: fingerprint of the text encoder's weights.
      vae: fingerprint of the VAE's weights.
      dtype: type of the parameters that make them, and so of the features.
    """

    def __init__(
        self, folder: str | Path, networks: Networks, *, text_encoder: str, vae: str, dtype: Any
    ):
        self.folder = Path(folder)
        self.dtype = np.dtype(dtype)
        self._weights = {"text": text_encoder, "latents": vae}
        self._text_width = networks.text_encoder.cfg.feature_width
        self._channels = networks.transformer.cfg.channels
        self._digests: dict[str, str] = {}  # of the image files seen

    def specs(self, layout: Layout) -> list[Spec]:
        """Return shape and type of a sample's text features, latents, and references' latents."""
        grids = [(*size, self._channels) for size in (layout.noise, *layout.references)]
        return [(shape, self.dtype) for shape in ((layout.text, self._text_width), *grids)]

    def text_key(self, ids: np.ndarray, length: int) -> str:
        """Return the name of a text's features; padding counts, since klein sees it."""
        return self._key("text", ids.astype(np.int32).tobytes().hex(), len(ids), int(length))

    def picture_key(self, picture: Picture) -> str:
        """Return the name of a picture's latents, from the bytes of its file.

        Raises:
          OSError, ValueError: it cannot be read.
        """
        digest = self._digests.get(picture.image)
        if digest is None:
            digest = hashlib.sha256(read_bytes(picture.image)).hexdigest()
            self._digests[picture.image] = digest
        return self._key("latents", digest, *picture.bucket, *picture.size)

    def file(self, key: str) -> Path:
        """Return where the features of a name lie."""
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> np.ndarray:
        """Return features.

        Raises:
          ValueError: they are not there, or their file is damaged.
        """
        if not self.file(key).exists():
            raise ValueError(
                f"{self.folder} has no {key.split('/')[0]} for it; the data, the policy, the "
                "buckets or the encoders are others than those the features were made for: make "
                "the features again, which adds what is missing"
            )
        with SafetensorsReader(self.file(key)) as reader:
            return reader.read(_TENSOR)

    def write(self, key: str, array: np.ndarray) -> None:
        """Write features, complete or not at all.

        Raises:
          WeightsError: the disk has too little room.
        """
        specs = {_TENSOR: (array.shape, array.dtype)}
        write_safetensors(self.file(key), specs, [(_TENSOR, array)])

    @staticmethod
    def file_size(spec: Spec) -> int:
        """Return the bytes of a file of features, to the byte."""
        return make_header({_TENSOR: spec}, {"format": "pt"})[2]

    def _key(self, kind: str, *content: Any) -> str:
        parts = json.dumps([kind, self._weights[kind], str(self.dtype), *content])
        digest = hashlib.sha256(parts.encode()).hexdigest()
        return f"{kind}/{digest[:2]}/{digest[2:34]}"
