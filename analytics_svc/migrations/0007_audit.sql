-- What the audit has proven.

CREATE TABLE audit_parts (
    kind text NOT NULL CHECK (kind IN ('day', 'branches', 'products', 'customers')),
    first text NOT NULL,
    last text NOT NULL,
    verdict int CHECK (verdict BETWEEN 1 AND 5),
    since timestamptz,
    found jsonb,
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
COMMENT ON COLUMN audit_parts.touched_at IS 'When something was last counted on this day.';
COMMENT ON COLUMN audit_parts.tried_at IS 'When it was last looked at, whatever came of it.';
-- Whatever there is lies in one of these ranges, which are cut as they grow.
INSERT INTO audit_parts (kind, first, last) VALUES
    ('branches', '0', '9223372036854775807'),
    ('products', '0', '9223372036854775807'),
    ('customers', '00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff');

CREATE TABLE audit_status (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    looked_from timestamptz,
    next_window date,
    compared_at timestamptz,
    compare_duration interval NOT NULL DEFAULT '0'
) WITH (fillfactor = 50);
COMMENT ON TABLE audit_status IS 'How far the audit has come, for whoever is asked and whoever goes on.';
COMMENT ON COLUMN audit_status.looked_from IS 'What was counted since then is to be looked at next.';
COMMENT ON COLUMN audit_status.next_window IS 'From where on recorded days are looked through next; NULL: from the first.';
COMMENT ON COLUMN audit_status.compared_at IS 'When the sums of all days that change were compared last.';
INSERT INTO audit_status DEFAULT VALUES;

GRANT SELECT, INSERT, UPDATE, DELETE ON audit_parts TO analytics_consumer;
GRANT SELECT, UPDATE ON audit_status TO analytics_consumer;
