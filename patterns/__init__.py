"""Say what is recognised and what fuses; one idea per file.

Nothing in this package compiles, runs or imports from ``lowering``: it looks at
torch-dialect IR and describes what it found with the frozen values of
``patterns.contracts``.
"""
