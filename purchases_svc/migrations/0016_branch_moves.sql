-- Branches that have moved from one cell to another, or are about to. In either cell the database says whose sales it
-- takes; a file that some process has not read yet decides nothing. `retail-purchases move` writes this, as the owner.

CREATE TABLE branch_moves (
    branch_id int PRIMARY KEY CHECK (branch_id > 0),
    state text NOT NULL CHECK (state IN ('HERE', 'LEAVING', 'LEFT', 'ARRIVING')),
    other_cell text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    mover uuid NOT NULL,
    from_realm text,
    from_xid xid8,
    copied_time timestamptz,
    copied_id uuid
);
COMMENT ON COLUMN branch_moves.state IS 'HERE: its sales are taken. LEAVING: the last ones are being copied. LEFT: the '
    'other cell takes them. ARRIVING: it is being copied to here, and what is here is not told to anybody.';
COMMENT ON COLUMN branch_moves.mover IS 'The one command that may go on with the move: who starts another one takes it over.';
COMMENT ON COLUMN branch_moves.from_xid IS 'Of the other cell, in from_realm: what transactions before this one recorded '
    'has been copied, once the first copy is complete.';
COMMENT ON COLUMN branch_moves.copied_id IS 'Where the first copy has come to, with copied_time; null: it is complete, or '
    'has not begun (then from_xid is null, too).';
GRANT SELECT ON branch_moves TO purchases_service;

-- Branches of which no sale is taken here. Whoever records one looks into this table in the same statement, and so holds
-- a lock of it until the commit: who has locked it for himself knows that no sale is under way any more. Nobody else
-- reads it.
CREATE TABLE closed_branches (branch_id int PRIMARY KEY);
GRANT SELECT ON closed_branches TO purchases_service;

-- Whose sales are told of in the other cell. Of a branch that has left, both tell for an hour, so that who asks one after
-- the other is told by one at least.
CREATE VIEW unlisted_branches AS
    SELECT branch_id FROM branch_moves
    WHERE state = 'ARRIVING' OR state = 'LEFT' AND since < now() - interval '1 hour';
GRANT SELECT ON unlisted_branches TO purchases_service;
