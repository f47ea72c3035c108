"""Operators to kernels: one rule a kind of operator, by what it decides.

`lowering` is what rules share. `products` decides what is fused into a product, `attention` where keys
and values go, `experts` the kernels of a mixture, `tokens` what is done row by row and to numbers.
"""
