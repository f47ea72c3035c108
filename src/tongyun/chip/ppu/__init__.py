"""The PPU as software: instructions, assembler, compiler, functional and timing simulator.

Stages in the order they run: `isa` (what a word means), `asm` (text and words), `lower` with its
`rules` and `emit` (operators to instructions), `functional` (what a program computes), `timing` (when),
`energy` (with how many joules). `docs/isa.md` is made from `isa`.
"""
