-- Helena's own bookkeeping, version 1: which database this is, how far each spool has come in each
-- table, and which folder a document namespace belongs to.

DO $helena$
BEGIN
    IF to_regclass('helena.meta') IS NOT NULL THEN
        RETURN;
    END IF;
    -- The schema may have been made by hand for a role that may not create any.
    IF to_regnamespace('helena') IS NULL THEN
        CREATE SCHEMA helena;
    END IF;

    CREATE TABLE helena.meta (
        id uuid NOT NULL DEFAULT gen_random_uuid(),
        version integer NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE UNIQUE INDEX meta_has_one_row ON helena.meta ((true));

    CREATE TABLE helena.spool_position (
        spool_id text NOT NULL,
        table_name text NOT NULL,
        last_operation_id bigint NOT NULL DEFAULT 0,
        held bigint[] NOT NULL DEFAULT '{}',
        nonce text NOT NULL DEFAULT '',
        host text,
        updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (spool_id, table_name)
    );

    CREATE TABLE helena.roots (
        namespace text PRIMARY KEY,
        host text NOT NULL,
        path text NOT NULL,
        claimed_at timestamptz NOT NULL DEFAULT now()
    );

    -- Every role that writes through Helena moves its own position in the transaction that writes its
    -- rows, so all roles may use these tables. They hold no document's content. To restrict them:
    --     REVOKE ALL ON SCHEMA helena FROM PUBLIC;  GRANT USAGE ON SCHEMA helena TO the_writers;
    GRANT USAGE ON SCHEMA helena TO PUBLIC;
    GRANT SELECT ON helena.meta TO PUBLIC;
    GRANT SELECT, INSERT, UPDATE ON helena.spool_position TO PUBLIC;
    GRANT SELECT, INSERT, UPDATE, DELETE ON helena.roots TO PUBLIC;

    INSERT INTO helena.meta (version) VALUES (1);
END
$helena$;
