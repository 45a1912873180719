-- What audit and repair need: which day an event was counted on, what is counted while a rebuild is under way, and
-- what the continuous audit found.

-- Events arrive about in the order of their days: summaries of block ranges find a day's events for next to nothing.
ALTER TABLE analytics_event_log ADD COLUMN day date;
COMMENT ON COLUMN analytics_event_log.day IS
    'The business day it counts on. NULL: counted before this was kept, or counted no more, as nobody recorded it.';
CREATE INDEX analytics_event_log_day ON analytics_event_log USING brin (day date_minmax_multi_ops)
    WITH (pages_per_range = 16, autosummarize = on);
CREATE INDEX analytics_event_log_processed_at ON analytics_event_log USING brin (processed_at)
    WITH (pages_per_range = 16, autosummarize = on);

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
INSERT INTO audit_status (log_has_days_from)
    SELECT CASE WHEN EXISTS (SELECT FROM analytics_event_log) THEN (now() + interval '2 days')::date END;

DO $$
BEGIN
    EXECUTE format('GRANT TEMPORARY ON DATABASE %I TO analytics_consumer', current_database());
END
$$;
REVOKE ALL ON rebuild_tail, audit_status FROM PUBLIC;
GRANT SELECT, INSERT, DELETE ON rebuild_tail TO analytics_consumer;
GRANT SELECT, UPDATE ON audit_status TO analytics_consumer;
GRANT UPDATE (day) ON analytics_event_log TO analytics_consumer;
-- A repair takes away rows that should never have been.
GRANT DELETE ON daily_sales_by_branch, daily_sales_of_chain, monthly_sales_by_branch, product_sales_daily,
    product_sales_monthly, product_sales_totals, customer_loyalty, customer_loyalty_chain, sales_totals
    TO analytics_consumer;
