-- What an administrator does once on a PostgreSQL server, before the migrations run: with psql of PostgreSQL 14 or later,
-- ON_ERROR_STOP=1, and the passwords in the environment.
\getenv purchases_owner PURCHASES_OWNER_PASSWORD
\getenv analytics_owner ANALYTICS_OWNER_PASSWORD
\getenv purchases PURCHASES_PASSWORD
\getenv relay RELAY_PASSWORD
\getenv consumer CONSUMER_PASSWORD
\getenv analytics ANALYTICS_PASSWORD

-- The owners run the migrations (`migrate`), and nothing else needs their passwords.
CREATE ROLE purchases_owner LOGIN PASSWORD :'purchases_owner';
CREATE ROLE analytics_owner LOGIN PASSWORD :'analytics_owner';
CREATE DATABASE purchases OWNER purchases_owner;
CREATE DATABASE analytics OWNER analytics_owner;

-- What each process may do: the migrations grant it to these groups. Owners that may create roles make them themselves.
CREATE ROLE purchases_service NOLOGIN ADMIN purchases_owner;
CREATE ROLE purchases_relay NOLOGIN ADMIN purchases_owner;
CREATE ROLE analytics_consumer NOLOGIN ADMIN analytics_owner;
CREATE ROLE analytics_server NOLOGIN ADMIN analytics_owner;

-- A login for each process, in its one group.
CREATE ROLE local_purchases LOGIN PASSWORD :'purchases' IN ROLE purchases_service;
CREATE ROLE local_relay LOGIN PASSWORD :'relay' IN ROLE purchases_relay;
CREATE ROLE local_consumer LOGIN PASSWORD :'consumer' IN ROLE analytics_consumer;
CREATE ROLE local_analytics LOGIN PASSWORD :'analytics' IN ROLE analytics_server;

-- Nobody else gets in, and no process into the other database; and nobody makes temporary objects.
REVOKE CONNECT, TEMPORARY ON DATABASE purchases, analytics FROM PUBLIC;
GRANT CONNECT ON DATABASE purchases TO purchases_service, purchases_relay;
GRANT CONNECT ON DATABASE analytics TO analytics_consumer, analytics_server;

-- That `retail-relay status` can name the sessions that hold back vacuum, whoever's they are.
GRANT pg_monitor TO purchases_owner;
