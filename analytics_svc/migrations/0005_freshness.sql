-- What the query servers need to follow the write half: numbered announcements, and a look at which events are counted.

ALTER TABLE freshness ADD COLUMN announced_count bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN freshness.announced_count IS
    'Number of the last announcement (NOTIFY sales_applied): one for each commit that a reader could see, without gaps.';

-- For consistency tokens. Only ids: query servers have no use for the rest.
GRANT SELECT (event_id) ON analytics_event_log, quarantined_events TO analytics_server;
