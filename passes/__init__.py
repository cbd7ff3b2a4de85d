"""Graph passes: capture -> match -> verify -> raise -> lower. Knows graphs only.

Nothing here imports kernels or the product around it; lowering takes a factory from site to module.
"""

from __future__ import annotations
