-- What the consumer needs to tell poison from bad luck, and to forget old events without ever counting one twice.

ALTER TABLE freshness ADD COLUMN oldest_awaited_id uuid, ADD COLUMN log_floor uuid;
COMMENT ON COLUMN freshness.oldest_awaited_id IS
    'The lowest id of those purchases known to be committed that are not counted yet; NULL when there is none.';
COMMENT ON COLUMN freshness.log_floor IS
    'The event log may lack ids below it: what arrives with one is not counted. NULL: the log is complete.';

-- An id that was below the floor once may be forgotten already.
CREATE FUNCTION refuse_lower_floor() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.log_floor IS NULL OR NEW.log_floor < OLD.log_floor THEN
        RAISE EXCEPTION 'the floor of the event log never goes back';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER log_floor BEFORE UPDATE OF log_floor ON freshness
    FOR EACH ROW WHEN (OLD.log_floor IS NOT NULL) EXECUTE FUNCTION refuse_lower_floor();

-- Runs as its owner: the consumer itself may delete nothing from the log, so no mistake of it can go above the floor.
CREATE FUNCTION forget_events(after_id uuid, most int) RETURNS uuid
    LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    WITH old AS (
        SELECT event_id FROM analytics_event_log
        WHERE event_id > after_id AND event_id < (SELECT log_floor FROM freshness)
        ORDER BY event_id
        LIMIT most
    ), forgotten AS (
        DELETE FROM analytics_event_log WHERE event_id IN (SELECT event_id FROM old) RETURNING event_id
    )
    SELECT event_id FROM forgotten ORDER BY event_id DESC LIMIT 1
$$;
COMMENT ON FUNCTION forget_events IS
    'Deletes the lowest ids after one and below the floor, `most` of them; returns the highest deleted, or NULL.';

CREATE TABLE message_trials (
    body_sha256 bytea PRIMARY KEY CHECK (length(body_sha256) = 32),
    deaths int NOT NULL DEFAULT 0 CHECK (deaths >= 0),
    tried_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE message_trials IS
    'Messages that were delivered before and not settled, while they are tried again. Who survives takes its rows away.';
COMMENT ON COLUMN message_trials.deaths IS
    'Trials of this message alone that began and have no end: each, but one under way, is a process that died in it.';

-- Lists of the quarantine, the oldest first.
CREATE INDEX quarantined_events_oldest ON quarantined_events (quarantined_at, quarantine_id);
CREATE INDEX quarantined_events_reason ON quarantined_events (reason, quarantined_at, quarantine_id);

REVOKE ALL ON message_trials FROM PUBLIC;
REVOKE ALL ON FUNCTION refuse_lower_floor, forget_events FROM PUBLIC;

GRANT SELECT, INSERT, UPDATE, DELETE ON message_trials TO analytics_consumer;
GRANT EXECUTE ON FUNCTION forget_events TO analytics_consumer;
GRANT DELETE, UPDATE (reason, detail) ON quarantined_events TO analytics_consumer;
GRANT SELECT (page_token_key) ON analytics_settings TO analytics_consumer; -- it serves pages of the quarantine
