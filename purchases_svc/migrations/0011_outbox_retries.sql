-- The few events that wait for another attempt, or were requeued.
CREATE INDEX CONCURRENTLY outbox_events_due ON outbox_events (next_attempt_at) WHERE next_attempt_at IS NOT NULL;
