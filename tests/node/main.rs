//! The node from outside: the real binary between a real Mosquitto, PostgreSQL and Kafka, judged by what was published
//! and what arrived.

mod access;
mod bad_input;
mod clock;
mod commands;
mod dead_letters;
mod doctor;
mod kill;
mod outages;
mod parts;
mod reload;
mod secrets;
mod service;
mod stop;
mod streams;
mod world;
