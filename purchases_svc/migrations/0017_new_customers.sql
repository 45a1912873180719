-- A customer whom one cell knows is known in all: each asks the others for those who are new there. Who is registered in two
-- cells at once is in both, which is no conflict: a customer is nothing but an id.

ALTER TABLE customers ADD COLUMN created_xid xid8;
ALTER TABLE customers ALTER COLUMN created_xid SET DEFAULT pg_current_xact_id(); -- of those to come: no row is rewritten
COMMENT ON COLUMN customers.created_xid IS 'The transaction that wrote it, which tells who is new. Null: nobody noted it.';

CREATE TABLE other_cells (
    cell text PRIMARY KEY,
    customers_position text NOT NULL DEFAULT '',
    asked_at timestamptz NOT NULL DEFAULT '-infinity',
    known_at timestamptz
);
COMMENT ON COLUMN other_cells.customers_position IS 'What to ask the cell with for customers who are new.';
COMMENT ON COLUMN other_cells.known_at IS 'By its clock: whom it knew before is known here.';
GRANT SELECT, INSERT, UPDATE (customers_position, asked_at, known_at) ON other_cells TO purchases_service;
