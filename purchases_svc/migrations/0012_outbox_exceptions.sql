-- Those that were ever tried in vain, or requeued, and were not sent since: what was given up is among them.
CREATE INDEX CONCURRENTLY outbox_events_exceptions ON outbox_events (event_id) WHERE next_attempt_at IS NOT NULL;
