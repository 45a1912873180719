-- How far the read models have come, and how old events are forgotten without ever counting one twice.

CREATE TABLE freshness (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    applied_at timestamptz,
    quarantined_count bigint NOT NULL DEFAULT 0 CHECK (quarantined_count >= 0),
    complete_through_at timestamptz,
    after_snapshot text,
    oldest_awaited_id uuid,
    log_floor uuid,
    announced_count bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
COMMENT ON TABLE freshness IS 'How far the read models have come; read together with every answer.';
COMMENT ON COLUMN freshness.applied_at IS 'When the newest batch of events was counted; NULL before the first.';
COMMENT ON COLUMN freshness.quarantined_count IS 'Rows of quarantined_events, kept by its trigger.';
COMMENT ON COLUMN freshness.complete_through_at IS
    'Every purchase committed before it is counted or quarantined; NULL until that is known.';
COMMENT ON COLUMN freshness.after_snapshot IS 'The snapshot of the purchases database that complete_through_at stands for.';
COMMENT ON COLUMN freshness.oldest_awaited_id IS
    'The lowest id of those purchases known to be committed that are not counted yet; NULL when there is none.';
COMMENT ON COLUMN freshness.log_floor IS
    'The event log may lack ids below it: what arrives with one is not counted. NULL: the log is complete.';
COMMENT ON COLUMN freshness.announced_count IS
    'Number of the last announcement (NOTIFY sales_applied): one for each commit that a reader could see, without gaps.';
INSERT INTO freshness DEFAULT VALUES;
GRANT SELECT, UPDATE ON freshness TO analytics_consumer;
GRANT SELECT ON freshness TO analytics_server;

CREATE TABLE apply_lock ();
COMMENT ON TABLE apply_lock IS
    'Locked by whoever counts, in a mode that they share, and by whoever must have them wait, in one that excludes them. '
    'Not an advisory lock, which every login might hold.';
GRANT UPDATE ON apply_lock TO analytics_consumer;

-- An id that was below the floor once may be forgotten already.
CREATE FUNCTION refuse_lower_floor() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.log_floor IS NULL OR NEW.log_floor < OLD.log_floor THEN
        RAISE EXCEPTION 'the floor of the event log never goes back';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER log_floor BEFORE UPDATE OF log_floor ON freshness
    FOR EACH ROW WHEN (OLD.log_floor IS NOT NULL) EXECUTE FUNCTION refuse_lower_floor();
REVOKE ALL ON FUNCTION refuse_lower_floor FROM PUBLIC;

CREATE TABLE forgotten_visits (
    customer_id uuid,
    branch_id int,
    day date,
    purchases_count bigint NOT NULL CHECK (purchases_count > 0),
    last_purchase_at timestamptz NOT NULL,
    PRIMARY KEY (customer_id, branch_id, day)
);
COMMENT ON TABLE forgotten_visits IS
    'What the event log has forgotten of customers. Their rows follow from here and from the log, at any time.';
CREATE INDEX forgotten_visits_day ON forgotten_visits (day);
GRANT SELECT, INSERT, DELETE ON forgotten_visits TO analytics_consumer; -- a repair writes those of a day anew

-- Runs as its owner: the consumer itself may delete nothing from the log, so no mistake of it can go above the floor.
CREATE FUNCTION forget_events(after_id uuid, most int) RETURNS uuid
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH old AS (
        SELECT event_id FROM public.analytics_event_log
        WHERE event_id > after_id AND event_id < (SELECT log_floor FROM public.freshness)
        ORDER BY event_id
        LIMIT most
    ), forgotten AS (
        DELETE FROM public.analytics_event_log WHERE event_id IN (SELECT event_id FROM old)
        RETURNING event_id, day, branch_id, customer_id, purchase_time
    ), visits AS (
        INSERT INTO public.forgotten_visits AS stored (customer_id, branch_id, day, purchases_count, last_purchase_at)
        SELECT customer_id, branch_id, day, count(*), max(purchase_time) FROM forgotten
        WHERE customer_id IS NOT NULL AND day IS NOT NULL GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
        ON CONFLICT (customer_id, branch_id, day) DO UPDATE SET
            purchases_count = stored.purchases_count + excluded.purchases_count,
            last_purchase_at = greatest(stored.last_purchase_at, excluded.last_purchase_at)
    )
    SELECT event_id FROM forgotten ORDER BY event_id DESC LIMIT 1
$$;
COMMENT ON FUNCTION forget_events IS
    'Deletes the lowest ids after one and below the floor, `most` of them; returns the highest deleted, or NULL.';
REVOKE ALL ON FUNCTION forget_events FROM PUBLIC;
GRANT EXECUTE ON FUNCTION forget_events TO analytics_consumer;

-- Runs as its owner, whom the activity of others may be shown to (pg_read_all_stats); the consumer need not see it.
CREATE FUNCTION snapshot_held() RETURNS interval
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(max(held), '0') FROM (
        SELECT clock_timestamp() - xact_start AS held FROM pg_stat_activity
        -- A snapshot counts in its own database, a standby's and what writes in every one; a vacuum holds back nothing.
        WHERE pid <> pg_backend_pid() AND query NOT ILIKE 'vacuum%' AND (backend_xid IS NOT NULL
            OR backend_xmin IS NOT NULL AND (datname = current_database() OR backend_type = 'walsender'))
        UNION ALL SELECT clock_timestamp() - prepared FROM pg_prepared_xacts
    ) AS holder
$$;
COMMENT ON FUNCTION snapshot_held IS
    'For how long somebody has held back vacuum: the rows that every commit changes get slower all the while.';
REVOKE ALL ON FUNCTION snapshot_held FROM PUBLIC;
GRANT EXECUTE ON FUNCTION snapshot_held TO analytics_consumer;
