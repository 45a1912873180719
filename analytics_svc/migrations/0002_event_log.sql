-- Which events are counted.

CREATE TABLE analytics_event_log (
    event_id uuid PRIMARY KEY,
    processed_at timestamptz NOT NULL DEFAULT now(),
    event_type text NOT NULL CHECK (length(event_type) <= 100),
    day date,
    branch_id int,
    customer_id uuid,
    purchase_time timestamptz,
    purchase_id uuid,
    checksum bigint
);
COMMENT ON TABLE analytics_event_log IS
    'Every event that is counted. Its row commits together with its effect on the sums: the reason why it counts once.';
COMMENT ON COLUMN analytics_event_log.day IS
    'The business day it counts on. NULL: counted no more, as nobody recorded it.';
COMMENT ON COLUMN analytics_event_log.purchase_id IS 'What it announced, by its own account.';
COMMENT ON COLUMN analytics_event_log.checksum IS
    'Of what was counted: another event with this id is a conflict, not a duplicate.';
-- What the rows of a customer must say follows from here.
CREATE INDEX analytics_event_log_customer ON analytics_event_log (customer_id, branch_id, purchase_time)
    WHERE customer_id IS NOT NULL;
-- Events arrive about in the order of their days: summaries of block ranges find a day's events for next to nothing.
CREATE INDEX analytics_event_log_day ON analytics_event_log USING brin (day date_minmax_multi_ops)
    WITH (pages_per_range = 16, autosummarize = on);
CREATE INDEX analytics_event_log_processed_at ON analytics_event_log USING brin (processed_at)
    WITH (pages_per_range = 16, autosummarize = on);
GRANT SELECT, INSERT, UPDATE (day, branch_id, customer_id, purchase_time, purchase_id, checksum)
    ON analytics_event_log TO analytics_consumer;
GRANT SELECT (event_id) ON analytics_event_log TO analytics_server; -- for consistency tokens; it has no use for the rest
