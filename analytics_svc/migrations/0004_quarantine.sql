-- What cannot be counted, and what it takes to tell poison from bad luck.

CREATE TABLE quarantined_events (
    quarantine_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    event_id uuid,
    reason text NOT NULL CHECK (reason ~ '^[A-Z][A-Z_]{0,62}$'),
    detail text NOT NULL CHECK (length(detail) <= 1000),
    body bytea NOT NULL,
    properties jsonb NOT NULL,
    quarantined_at timestamptz NOT NULL DEFAULT now(),
    body_sha256 bytea NOT NULL GENERATED ALWAYS AS (sha256(body)) STORED,
    body_size int,
    -- Delivered again, the same poison finds its row.
    UNIQUE NULLS NOT DISTINCT (body_sha256, reason, event_id)
);
COMMENT ON TABLE quarantined_events IS 'Events that could not be counted: nothing that arrives is dropped.';
COMMENT ON COLUMN quarantined_events.event_id IS 'From the body, else from the message; NULL when neither has one.';
COMMENT ON COLUMN quarantined_events.body IS 'As it arrived, byte for byte; of a large one the beginning.';
COMMENT ON COLUMN quarantined_events.body_size IS
    'Bytes of the whole body as it arrived; NULL: those of the body that is here.';
COMMENT ON COLUMN quarantined_events.properties IS 'The message''s AMQP properties, headers included.';
CREATE INDEX quarantined_events_event_id ON quarantined_events (event_id);
-- Lists of the quarantine, the oldest first.
CREATE INDEX quarantined_events_oldest ON quarantined_events (quarantined_at, quarantine_id);
CREATE INDEX quarantined_events_reason ON quarantined_events (reason, quarantined_at, quarantine_id);

-- Every answer carries the number of quarantined events. Counting them each time would make all queries slow on the
-- very day that a producer floods the quarantine.
CREATE FUNCTION count_quarantined_events() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        UPDATE public.freshness SET quarantined_count = quarantined_count + (SELECT count(*) FROM changed);
    ELSIF TG_OP = 'DELETE' THEN
        UPDATE public.freshness SET quarantined_count = quarantined_count - (SELECT count(*) FROM changed);
    ELSE
        UPDATE public.freshness SET quarantined_count = 0;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER inserted AFTER INSERT ON quarantined_events REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_quarantined_events();
CREATE TRIGGER deleted AFTER DELETE ON quarantined_events REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_quarantined_events();
CREATE TRIGGER truncated AFTER TRUNCATE ON quarantined_events
    FOR EACH STATEMENT EXECUTE FUNCTION count_quarantined_events();
REVOKE ALL ON FUNCTION count_quarantined_events() FROM PUBLIC;

CREATE TABLE message_trials (
    body_sha256 bytea PRIMARY KEY CHECK (length(body_sha256) = 32),
    deaths int NOT NULL DEFAULT 0 CHECK (deaths >= 0),
    tried_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE message_trials IS
    'Messages that were delivered before and not settled, while they are tried again. Who survives takes its rows away.';
COMMENT ON COLUMN message_trials.deaths IS
    'Trials of this message alone that began and have no end: each, but one under way, is a process that died in it.';

GRANT SELECT, INSERT, DELETE, UPDATE (reason, detail) ON quarantined_events TO analytics_consumer;
GRANT SELECT (event_id) ON quarantined_events TO analytics_server; -- for consistency tokens
GRANT SELECT, INSERT, UPDATE, DELETE ON message_trials TO analytics_consumer;
