-- What tills' own journals have given out, and what of it is here. A sale that comes without a place in a journal, which
-- is any sale of a till that keeps none, leaves nothing in these tables.

CREATE TABLE till_journals (
    branch_id int NOT NULL CHECK (branch_id > 0),
    pos_id text NOT NULL,
    epoch uuid NOT NULL,
    first_sequence bigint NOT NULL CHECK (first_sequence > 0),
    last_sequence bigint NOT NULL,
    complete_through bigint NOT NULL,
    complete_since timestamptz NOT NULL DEFAULT now(),
    clock_offset_ms bigint,
    registered_at timestamptz NOT NULL DEFAULT now(),
    reported_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (branch_id, pos_id, epoch),
    CHECK (last_sequence >= first_sequence - 1 AND complete_through >= first_sequence - 1)
);
COMMENT ON COLUMN till_journals.last_sequence IS 'The highest number that the till says to have given out.';
COMMENT ON COLUMN till_journals.complete_through IS
    'Every number up to this one was here when the till reported last; till_complete_through() looks from here on.';
COMMENT ON COLUMN till_journals.complete_since IS
    'When complete_through last moved, or nothing was missing: a gap is as old as this at most.';
GRANT SELECT, INSERT, UPDATE (last_sequence, complete_through, complete_since, clock_offset_ms, reported_at)
    ON till_journals TO purchases_service;

CREATE TABLE till_sales (
    branch_id int NOT NULL,
    pos_id text NOT NULL,
    epoch uuid NOT NULL,
    sequence bigint NOT NULL CHECK (sequence > 0),
    purchase_id uuid,
    clock_offset_ms bigint,
    PRIMARY KEY (branch_id, pos_id, epoch, sequence)
);
COMMENT ON COLUMN till_sales.purchase_id IS 'NULL: the till says that no sale will ever have this number.';
COMMENT ON COLUMN till_sales.clock_offset_ms IS
    'By how much our clock was ahead of the till''s, as the till last saw it: purchase_time is by the till''s.';
GRANT SELECT, INSERT ON till_sales TO purchases_service;

CREATE TABLE till_conflicts (
    branch_id int NOT NULL,
    pos_id text NOT NULL,
    epoch uuid NOT NULL,
    sequence bigint NOT NULL,
    purchase_id uuid NOT NULL,
    noted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (branch_id, pos_id, epoch, sequence, purchase_id)
);
COMMENT ON TABLE till_conflicts IS 'Sales that came with a number that another sale had: the till''s disk was restored from '
    'an image, or cloned. They are recorded like any other.';
GRANT SELECT, INSERT ON till_conflicts TO purchases_service;
