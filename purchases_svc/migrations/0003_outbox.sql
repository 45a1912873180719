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
CREATE INDEX ON outbox_events (created_xid);
-- How the relay finds events: in the order of the transactions that wrote them. What committed since it looked last is
-- exactly what its last snapshot did not show; ids are made of clocks, which differ between machines and jump.
CREATE INDEX outbox_events_new ON outbox_events (created_xid, event_id) WHERE status = 'NEW';
-- Of those, the few that wait for another attempt, or were requeued.
CREATE INDEX outbox_events_retry ON outbox_events (next_attempt_at) WHERE status = 'NEW' AND next_attempt_at IS NOT NULL;
CREATE INDEX outbox_events_failed ON outbox_events (event_id) WHERE status = 'FAILED';
GRANT SELECT, INSERT ON outbox_events TO purchases_service;
GRANT SELECT, UPDATE (status, attempts, last_error, sent_at, next_attempt_at) ON outbox_events TO purchases_relay;

-- The least UUIDv7 of a moment.
CREATE FUNCTION uuid7_floor(moment timestamptz) RETURNS uuid
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN (lpad(to_hex(floor(extract(epoch FROM moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;
