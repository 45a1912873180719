-- What is counted while a rebuild is under way, and what the continuous audit found.

-- Unlogged: after a crash of the server it is empty, and the rebuild that it was for is gone as well.
CREATE UNLOGGED TABLE rebuild_tail (
    event_id uuid NOT NULL,
    event jsonb NOT NULL
);
COMMENT ON TABLE rebuild_tail IS
    'Events counted while a rebuild is under way, which it must count, too. What an interrupted one left is harmless.';

CREATE TABLE audit_status (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    log_has_days_from date,
    started_at timestamptz,
    ended_at timestamptz,
    report jsonb,
    sweep_day date,
    sweep_started_at timestamptz,
    sweep_ended_at timestamptz
) WITH (fillfactor = 50);
COMMENT ON TABLE audit_status IS 'The last cycle of the continuous audit, for whoever is asked and whoever goes on.';
COMMENT ON COLUMN audit_status.log_has_days_from IS
    'The first business day whose events are all in the log with their day; NULL: of all days.';
COMMENT ON COLUMN audit_status.started_at IS 'What was counted since then is the next cycle''s to look at.';
COMMENT ON COLUMN audit_status.sweep_day IS 'The last day that the sweep through all days has compared row by row.';
INSERT INTO audit_status DEFAULT VALUES;

DO $$
BEGIN
    EXECUTE format('GRANT TEMPORARY ON DATABASE %I TO analytics_consumer', current_database());
END
$$;
GRANT SELECT, INSERT, DELETE ON rebuild_tail TO analytics_consumer;
GRANT SELECT, UPDATE ON audit_status TO analytics_consumer;
