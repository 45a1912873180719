-- Where tills' sales stood in their journals goes with the months that are dropped. What is proven of a journal stays: up
-- to which number all were here, and its highest one.

-- Forgets the numbers of each journal that come before all those of months that are still here, `most` of them at a time;
-- returns how many are gone, to be called until none is. A journal's numbers go from below, in their order: so no gap
-- comes to be that is none, and one that was among them is over, as no sale of a dropped month can come any more. Its
-- last number that may go stays, so that the highest one is always known. A journal that never reported keeps all.
CREATE FUNCTION forget_till_places(most int) RETURNS int
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' SET enable_seqscan = off SET timezone = 'UTC'
AS $$
DECLARE
    first_here uuid := public.uuid7_floor(least(
        (SELECT dropped_before::timestamptz FROM public.chain_settings),
        (SELECT min(to_date(right(c.relname, 7), 'YYYY_MM'))::timestamptz
            FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'public.purchases'::regclass)));
    journal record;
    through bigint;
    gone int;
    forgotten int := 0;
BEGIN
    FOR journal IN SELECT branch_id, pos_id, epoch FROM public.till_journals ORDER BY branch_id, pos_id, epoch LOOP
        EXIT WHEN forgotten >= most;
        SELECT max(sequence) INTO through FROM (
            SELECT sequence, purchase_id, bool_or(purchase_id >= first_here) OVER (ORDER BY sequence) AS here FROM (
                SELECT sequence, purchase_id FROM public.till_sales s
                WHERE (s.branch_id, s.pos_id, s.epoch) = (journal.branch_id, journal.pos_id, journal.epoch)
                    AND purchase_id IS NOT NULL
                ORDER BY sequence LIMIT most - forgotten + 1
            ) AS lowest
        ) AS looked_at WHERE NOT here;
        CONTINUE WHEN through IS NULL;
        UPDATE public.till_journals j SET complete_through = through
            WHERE (j.branch_id, j.pos_id, j.epoch) = (journal.branch_id, journal.pos_id, journal.epoch)
                AND complete_through < through;
        DELETE FROM public.till_conflicts c
            WHERE (c.branch_id, c.pos_id, c.epoch) = (journal.branch_id, journal.pos_id, journal.epoch)
                AND sequence < through;
        DELETE FROM public.till_sales s
            WHERE (s.branch_id, s.pos_id, s.epoch) = (journal.branch_id, journal.pos_id, journal.epoch)
                AND sequence < through;
        GET DIAGNOSTICS gone = ROW_COUNT;
        forgotten := forgotten + gone;
    END LOOP;
    RETURN forgotten;
END $$;
REVOKE EXECUTE ON FUNCTION forget_till_places(int) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION forget_till_places(int) TO purchases_service;
COMMENT ON COLUMN till_journals.complete_through IS
    'Every number up to this one was here when the till reported last, or is of a month that was dropped since.';
