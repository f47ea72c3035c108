"""Operators to instructions: one function a kind of kernel, each a program for all cores alike.

A kernel's units of work (tiles of an output, rows, heads) go round the cores: core c takes units c,
c + cores, …. Within a core, loads, products, epilogues and stores overlap through double buffers; the
control only names the work and never waits for it, except where a count comes from memory.
"""
