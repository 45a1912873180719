-- Customers in the order of the transactions that wrote them: who is new.
CREATE INDEX CONCURRENTLY customers_in_order ON customers (created_xid, customer_id);
