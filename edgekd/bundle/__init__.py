"""A bundle: one engine in a folder that can be copied to a device, with all that is needed to run it and to see that it is right.

::

    bundle.json        what it is, what was measured, and the sha256 and size of every file below
    engine/            the backend's files, io.json (pre- and postprocessing), engine.json, build.log
    model/             model.onnx, io.json, layers.json: an engine is bound to a machine, and another one is built from these
    golden.npz         images, and what the engine gave for them

Opening one needs NumPy and the engine's library; no torch.
"""

from edgekd.bundle.folder import Bundle, open_bundle

__all__ = ["Bundle", "open_bundle"]
