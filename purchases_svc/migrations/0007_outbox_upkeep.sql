-- How the relay finds events: in the order of the transactions that wrote them. What committed since it looked last is
-- exactly what its last snapshot did not show; ids are made of clocks, which differ between machines and jump.
DROP INDEX outbox_events_event_id_idx; -- of NEW events
CREATE INDEX outbox_events_new ON outbox_events (created_xid, event_id) WHERE status = 'NEW';
-- Of those, the few that wait for another attempt, or were requeued.
CREATE INDEX outbox_events_retry ON outbox_events (next_attempt_at) WHERE status = 'NEW' AND next_attempt_at IS NOT NULL;
ALTER INDEX outbox_events_event_id_idx1 RENAME TO outbox_events_failed;

-- Below this transaction id nothing waits, apart from retries. Counting from there costs what the backlog is worth, and
-- not what was sent since the last vacuum: with an old snapshot open that is millions of index entries.
CREATE TABLE outbox_low_water (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    realm text NOT NULL DEFAULT '',
    xid xid8 NOT NULL DEFAULT '0'
);
COMMENT ON TABLE outbox_low_water IS 'A help for counting only; the relay does not depend on it.';
INSERT INTO outbox_low_water DEFAULT VALUES;
GRANT SELECT ON outbox_low_water TO purchases_service, purchases_relay;
GRANT UPDATE (realm, xid) ON outbox_low_water TO purchases_relay;

CREATE FUNCTION outbox_low_water_xid() RETURNS xid8
    LANGUAGE sql STABLE SET search_path = public, pg_temp
    RETURN coalesce((SELECT xid FROM outbox_low_water WHERE realm = transaction_ids_realm()), '0');

-- Events that wait to be published, `most` at most.
CREATE FUNCTION outbox_waiting(most int) RETURNS bigint
    LANGUAGE plpgsql STABLE SET search_path = public, pg_temp SET enable_seqscan = off
AS $$
DECLARE
    low xid8 := outbox_low_water_xid();
    fresh bigint := (SELECT count(*) FROM (SELECT FROM outbox_events
        WHERE status = 'NEW' AND created_xid >= low LIMIT most) AS waiting);
BEGIN
    RETURN least(most, fresh + (SELECT count(*) FROM (SELECT FROM outbox_events
        WHERE status = 'NEW' AND next_attempt_at IS NOT NULL AND created_xid < low LIMIT most) AS retries));
END $$;

-- Relays that have nothing to do. Whoever writes an event while one waits tells it so, after the commit.
CREATE UNLOGGED TABLE relay_waiting (
    pid int PRIMARY KEY,
    until timestamptz NOT NULL
);
COMMENT ON COLUMN relay_waiting.until IS 'A relay that is gone says no more: its row counts for nothing after that.';
GRANT SELECT ON relay_waiting TO purchases_service;
GRANT SELECT, INSERT, UPDATE, DELETE ON relay_waiting TO purchases_relay;
