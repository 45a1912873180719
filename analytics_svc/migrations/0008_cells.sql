-- How far the events of each cell are settled; `freshness` has what follows from all of them.

CREATE TABLE cell_marks (
    cell text PRIMARY KEY,
    after_snapshot text,
    complete_through_at timestamptz,
    oldest_awaited_id uuid
) WITH (fillfactor = 50);
COMMENT ON TABLE cell_marks IS 'The cells that sales come from; one that nothing is known of yet holds back the time of all.';
COMMENT ON COLUMN cell_marks.after_snapshot IS
    'The snapshot of the cell''s database that complete_through_at stands for; NULL before the first.';
COMMENT ON COLUMN cell_marks.complete_through_at IS
    'Every purchase that the cell committed before it is counted or quarantined.';
COMMENT ON COLUMN cell_marks.oldest_awaited_id IS
    'The lowest id of those known to be committed that are not counted yet; NULL when there is none.';
GRANT SELECT, INSERT, UPDATE ON cell_marks TO analytics_consumer;

-- Until now there was one, of which `freshness` knew. A process of the release before goes on with what that says.
INSERT INTO cell_marks
SELECT 'default', after_snapshot, complete_through_at, oldest_awaited_id FROM freshness WHERE after_snapshot IS NOT NULL;
COMMENT ON COLUMN freshness.complete_through_at IS
    'Every purchase committed before it, in whatever cell, is counted or quarantined; NULL until that is known.';
COMMENT ON COLUMN freshness.after_snapshot IS 'Of the release before: nobody writes it any more.';
COMMENT ON COLUMN freshness.oldest_awaited_id IS 'The lowest of those of all cells; NULL when there is none.';
