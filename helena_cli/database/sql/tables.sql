-- The tables of documents, their use, messages and contexts. One that exists already, anywhere in the
-- search path, is used as it is: neither it nor its indexes are touched.

DO $helena$
BEGIN
    IF to_regclass('es_document_references') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE es_document_references (
        id serial PRIMARY KEY,
        es_index text NOT NULL,
        es_doc_id text NOT NULL UNIQUE,
        doc_type text,
        issuer text,
        report_url text,
        filename text,
        file_size bigint,
        sha256 text,
        indexed_at timestamp DEFAULT now(),
        data_classification text DEFAULT 'public'
            CHECK (data_classification IN ('public', 'confidential', 'internal', 'restricted')),
        investigation_id text,
        tags text[],
        metadata jsonb
    );
    CREATE INDEX ON es_document_references (es_index);
    CREATE INDEX ON es_document_references (investigation_id);
    CREATE INDEX ON es_document_references (issuer);
    CREATE INDEX ON es_document_references (indexed_at DESC);
    CREATE INDEX ON es_document_references USING gin (tags);
    CREATE INDEX ON es_document_references USING gin (metadata);
END
$helena$;

DO $helena$
BEGIN
    IF to_regclass('es_document_usage_log') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE es_document_usage_log (
        id serial PRIMARY KEY,
        es_doc_id text,
        accessed_by text NOT NULL,
        access_timestamp timestamp DEFAULT now(),
        query_used text,
        access_purpose text,
        session_id text,
        results_count integer,
        response_time_ms double precision
    );
    BEGIN
        ALTER TABLE es_document_usage_log
            ADD FOREIGN KEY (es_doc_id) REFERENCES es_document_references (es_doc_id)
            ON DELETE CASCADE;
    EXCEPTION
        -- Existing references of another shape: no such column, not unique, of another type, a view,
        -- or somebody else's.
        WHEN undefined_column OR invalid_foreign_key OR datatype_mismatch OR wrong_object_type
            OR insufficient_privilege
        THEN
            RAISE WARNING 'es_document_usage_log has no foreign key to es_document_references: %',
                SQLERRM;
    END;
END
$helena$;

DO $helena$
BEGIN
    IF to_regclass('messages') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE messages (
        id varchar(255) PRIMARY KEY,
        project_id text,
        sender text NOT NULL,
        recipient text,
        message_type text NOT NULL,
        content text NOT NULL,
        context jsonb,
        "timestamp" timestamp DEFAULT now(),
        requires_response boolean,
        response_to varchar(255) REFERENCES messages (id) ON DELETE SET NULL,
        importance double precision DEFAULT 0.5,
        tags text[]
    );
    CREATE INDEX ON messages USING gin (tags);
    CREATE INDEX ON messages USING gin (context);
END
$helena$;

DO $helena$
BEGIN
    IF to_regclass('agent_contexts') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE agent_contexts (
        agent_name text NOT NULL,
        project_id text NOT NULL,
        context_key text NOT NULL,
        context_value jsonb NOT NULL,
        updated_at timestamp DEFAULT now(),
        importance double precision,
        PRIMARY KEY (agent_name, project_id, context_key)
    );
END
$helena$;

DO $helena$
BEGIN
    IF to_regclass('documents') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE documents (
        file_path text PRIMARY KEY,
        document_type text,
        title text,
        content_preview text,
        line_count integer,
        created_at timestamp DEFAULT now(),
        indexed_at timestamp DEFAULT now(),
        source text
    );
END
$helena$;
