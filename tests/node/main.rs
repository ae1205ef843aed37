//! The node from outside: the real binary between a real Mosquitto, PostgreSQL and Kafka, judged by what was published
//! and what arrived.

mod access;
mod bad_input;
mod clock;
mod commands;
mod dead_letters;
mod disk;
mod doctor;
mod doctor_database;
mod doctor_machine;
mod harmed;
mod kill;
mod manager;
mod neighbours;
mod outages;
mod parts;
mod reload;
mod scale;
mod secrets;
mod service;
mod stop;
mod stopped_letters;
mod streams;
mod threads;
mod twins;
mod world;
