-- Which cell it is that complete_through_at waits for: told with every answer.
ALTER TABLE freshness ADD COLUMN furthest_behind text NOT NULL DEFAULT '';
COMMENT ON COLUMN freshness.furthest_behind IS
    'The cell whose sales go the least far, as complete_through_at says how far; empty where there is one cell.';
