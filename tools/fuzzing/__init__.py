"""Random graphs: their grammar, how a compiled one is judged, and the processes that do so.

``graph`` holds a graph as data and as source text; ``scope`` grows one, by the steps of ``norms``,
``quantizations``, ``arithmetic``, ``views`` and ``indexing``; ``evaluate`` and ``judge`` compare; ``worker``
is the child process and ``runner`` its parent; ``shrink`` takes steps away while a graph still fails.
"""
