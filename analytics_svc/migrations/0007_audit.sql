-- What the audit has proven.

CREATE TABLE audit_parts (
    kind text NOT NULL CHECK (kind IN ('day', 'branches', 'products', 'customers')),
    first text NOT NULL,
    last text NOT NULL,
    verdict int CHECK (verdict BETWEEN 1 AND 5),
    since timestamptz,
    seen_at timestamptz,
    found jsonb,
    wrong_count bigint NOT NULL DEFAULT 0,
    foreign_count bigint NOT NULL DEFAULT 0,
    pending_count bigint NOT NULL DEFAULT 0,
    touched_at timestamptz,
    tried_at timestamptz,
    proven_at timestamptz,
    PRIMARY KEY (kind, first)
) WITH (fillfactor = 50);
COMMENT ON TABLE audit_parts IS
    'A business day, or a range of branches, products or customers: when it was proven, and what was found.';
COMMENT ON COLUMN audit_parts.verdict IS
    '1 agreed, 2 pending, 3 different, 4 foreign, 5 not proven; NULL: never looked at. Wrong until it is proven right.';
COMMENT ON COLUMN audit_parts.since IS 'When this verdict was first given.';
COMMENT ON COLUMN audit_parts.seen_at IS 'Its verdict is of what was to be seen from then on: an older look improves none.';
COMMENT ON COLUMN audit_parts.found IS 'What is to be named of it; the counts are of everything.';
COMMENT ON COLUMN audit_parts.touched_at IS 'When it was noted last that something was recorded or counted on this day.';
COMMENT ON COLUMN audit_parts.tried_at IS 'When it was last looked at, whatever came of it.';
-- Whatever there is lies in one of these ranges, which are cut as they grow.
INSERT INTO audit_parts (kind, first, last) VALUES
    ('branches', '0', '9223372036854775807'),
    ('products', '0', '9223372036854775807'),
    ('customers', '00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff');

CREATE TABLE audit_status (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    recorded_position text NOT NULL DEFAULT '',
    counted_from timestamptz,
    compared_through timestamptz,
    compared_at timestamptz,
    compare_duration interval NOT NULL DEFAULT '0'
) WITH (fillfactor = 50);
COMMENT ON TABLE audit_status IS 'How far the audit has come, for whoever is asked and whoever goes on.';
COMMENT ON COLUMN audit_status.recorded_position IS
    'On which days something was recorded is noted up to there, in terms of the purchases service.';
COMMENT ON COLUMN audit_status.counted_from IS 'On which days something was counted is noted up to then.';
COMMENT ON COLUMN audit_status.compared_through IS
    'The sums of all days that had changed by then were compared, by the clock of the purchases'' database.';
COMMENT ON COLUMN audit_status.compared_at IS 'When the sums of all days that change were compared last.';
INSERT INTO audit_status DEFAULT VALUES;

GRANT SELECT, INSERT, UPDATE, DELETE ON audit_parts TO analytics_consumer;
GRANT SELECT, UPDATE ON audit_status TO analytics_consumer;
