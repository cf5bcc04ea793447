"""Folders of documents and pending files become operations.

`roots` says which folder a path belongs to, `scan` finds and reads the files, `front_matter`,
`rules` and `extract` (pure) turn one file into one row, `reconcile` compares what is on the disk
with what the database knows and queues the difference, `prune` plans what may be deleted for good.
A `crew` reads the files of a large run, with more processes, each a `reader`.
"""
