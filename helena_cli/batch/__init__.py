"""The batch engine: from an accepted operation to a committed row.

The way of an operation: `operation.encode` checks it, `Spool.append` makes it durable, the process
that holds the `Lease` flushes: `Engine` takes a `Batch` from the spool, a `Writer` plans it
(`plan`) and applies it in one transaction, and only after the commit does the spool forget it.
Nothing here knows of files that people edit, of PostgreSQL's protocol or of terminals.
"""
