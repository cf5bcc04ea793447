"""PostgreSQL: the only code that imports psycopg. Errors of the driver leave it translated."""
