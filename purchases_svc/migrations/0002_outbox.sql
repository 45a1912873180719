-- The transactional outbox: one event per purchase, committed with it. The relay publishes what is here.

CREATE TABLE outbox_events (
    event_id uuid PRIMARY KEY,
    event_type text NOT NULL,
    aggregate_id uuid NOT NULL,
    occurred_at timestamptz NOT NULL,
    payload_json jsonb NOT NULL,
    status text NOT NULL DEFAULT 'NEW' CHECK (status IN ('NEW', 'SENT', 'FAILED')),
    attempts int NOT NULL DEFAULT 0,
    last_error text,
    sent_at timestamptz,
    next_attempt_at timestamptz,
    created_xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    traceparent text
) PARTITION BY RANGE (event_id);
COMMENT ON COLUMN outbox_events.event_id IS 'UUIDv7 made when the purchase was recorded: ordered by that time.';
COMMENT ON COLUMN outbox_events.aggregate_id IS 'The purchase.';
COMMENT ON COLUMN outbox_events.attempts IS 'Failed attempts that were this event''s own fault; outages count for nothing.';
COMMENT ON COLUMN outbox_events.next_attempt_at IS 'Not to be published before; null: at once.';
COMMENT ON COLUMN outbox_events.created_xid IS 'The transaction that wrote it: tells what committed since a snapshot.';
COMMENT ON COLUMN outbox_events.traceparent IS 'W3C trace context of the call that recorded the purchase.';
CREATE INDEX ON outbox_events (event_id) WHERE status = 'NEW';
CREATE INDEX ON outbox_events (event_id) WHERE status = 'FAILED';
CREATE INDEX ON outbox_events (created_xid);
GRANT SELECT, INSERT ON outbox_events TO purchases_service;
GRANT SELECT, UPDATE (status, attempts, last_error, sent_at, next_attempt_at) ON outbox_events TO purchases_relay;

-- The least UUIDv7 of a moment.
CREATE FUNCTION uuid7_floor(moment timestamptz) RETURNS uuid
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN (lpad(to_hex(floor(extract(epoch FROM moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;

-- Makes sure that events of one day (UTC, by the clock of the service that made the id) can be stored. The same rules
-- as for ensure_purchases_month.
CREATE FUNCTION ensure_outbox_day(day date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    partition text := 'outbox_events_' || to_char(day, 'YYYY_MM_DD');
BEGIN
    IF day < '2000-01-01' OR day > now() + interval '1 year' THEN
        RAISE EXCEPTION 'no event can lie on the day %', day USING ERRCODE = 'datetime_field_overflow';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('ensure_outbox_day'));
    IF to_regclass(partition) IS NULL THEN
        EXECUTE format('CREATE TABLE %I PARTITION OF outbox_events FOR VALUES FROM (%L) TO (%L)',
            partition, uuid7_floor(day::timestamptz), uuid7_floor((day + 1)::timestamptz));
    END IF;
END $$;
REVOKE EXECUTE ON FUNCTION ensure_outbox_day(date) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ensure_outbox_day(date) TO purchases_service;
