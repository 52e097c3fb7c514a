"""Makes the Triton sources importable as `vcd_fast.kernels`, wherever they lie.

In a wheel they are in `vcd_fast/kernels/`, in a checkout in `kernels/` at the root. That root folder must not be importable as a
top-level `kernels` (a PyPI package of that name is probed, even imported, by diffusers and transformers), so it holds no
`__init__.py`; setting `__path__` here turns this module into the package instead.
"""

from pathlib import Path as _Path

_here = _Path(__file__).resolve().parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()][:1]
