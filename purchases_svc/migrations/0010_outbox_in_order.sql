-- The outbox in the order of the transactions that wrote it: how the relay finds what is new, and the reader of committed
-- events what it lacks. No index says what is sent and what is not, so no mark changes one.
CREATE INDEX CONCURRENTLY outbox_events_in_order ON outbox_events (created_xid, event_id);
