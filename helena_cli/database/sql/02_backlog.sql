-- Helena's own bookkeeping, version 2: which files of the SQL backlog have been applied. A file is
-- recorded in the transaction that applies it, by its name and the SHA-256 of its content.

DO $helena$
BEGIN
    IF (SELECT version FROM helena.meta) >= 2 THEN
        RETURN;
    END IF;

    CREATE TABLE helena.applied_files (
        file_name text NOT NULL,
        content_hash text NOT NULL,
        statements integer NOT NULL,
        rows bigint NOT NULL,
        host text,
        applied_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (file_name, content_hash)
    );

    -- Every role that applies files records them; see version 1.
    GRANT SELECT, INSERT ON helena.applied_files TO PUBLIC;

    UPDATE helena.meta SET version = 2;
END
$helena$;
